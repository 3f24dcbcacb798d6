"""The handle of a model's adapters: plain verbs that call the rooms below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adapterkit import composition, fusing, generating, merging, report, sharing, swapping
from adapterkit.activation import programs
from adapterkit.adapter import Adapter
from adapterkit.averaging import average as averaging
from adapterkit.composition import Fuse, Setup, names
from adapterkit.errors import ConfigError, NotAttachedError, PlanError, Problem, listing
from adapterkit.files import reader, setups, writer
from adapterkit.files.assemble import assemble
from adapterkit.files.content import Bundle
from adapterkit.inject.batch import leave, refuse_override
from adapterkit.inject.injector import cast, copies_of, dtype_named
from adapterkit.liveness import Liveness, examine, trained
from adapterkit.members import Members, Named
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.names import parse
from adapterkit.methods.targets import Layers, layers_of
from adapterkit.model.blueprint import Blueprint, Head
from adapterkit.overriding import alone, closed, opened
from adapterkit.planning import Draft, Plan, prepare
from adapterkit.routing import chosen
from adapterkit.runtime import Programs, Record

Method = str | Mapping[str, Any] | MethodConfig
Head_ = Literal["auto"] | bool


def _check_word(head: Any) -> None:
    if head not in ("auto", True, False):
        raise ConfigError(Problem("bad-option", f"{head!r} does not fit", "head", "'auto', True or False"))


class Kit(Named):
    """All adapters of one model: a read-only mapping from name to adapter, and the verbs."""

    def __init__(self, model: nn.Module, blueprint: Blueprint) -> None:
        self.model = model
        self.blueprint = blueprint
        self._members = Members(model, blueprint, self)
        super().__init__(self._members.adapters)
        self._runtime = self._members.runtime
        self._top = self._members.top
        self._entries = self._members.entries
        self._active: Setup | None = None
        self._skipped: Layers = ()
        self._groups = self._members.groups
        self._originals: merging.Originals | None = None
        self._compiled: dict[Any, Programs] = {}
        """Programs of setups that have been used, by all that they depend on."""

    # -- attach, load, plan

    def plan(
        self, method: Method, *, name: str = "default", strict: bool = True, head: Head_ = "auto"
    ) -> Plan:
        """What attach would do. Nothing is changed."""
        with torch.device("meta"):
            return prepare(self.blueprint, parse(method), name, self._heads(head), strict)[0]

    def supports(self, method: Method) -> bool:
        """Whether the method can be attached to this model completely.

        Raises: ConfigError: there is no such method, or it has no such option.
        """
        config = parse(method)
        try:
            self.plan(config, head=False)
        except (PlanError, ConfigError):
            return False
        return True

    def attach(
        self,
        method: Method,
        *,
        name: str = "default",
        activate: bool = True,
        trainable: bool = True,
        strict: bool = True,
        head: Head_ = "auto",
        seed: int | None = None,
        dtype: str | torch.dtype = "match",
        replace: bool = False,
    ) -> Kit:
        """Add an adapter; see `adapterkit.attach`."""
        config = parse(method)
        self._members.check_name(name, replace)
        if trainable:
            self._members.refuse_late(self.model)  # before weights are read
        heads = self._heads(head)
        plan, draft = prepare(self.blueprint, config, name, heads, strict, seed)
        cast(plan, draft, self.model, dtype)
        copies = copies_of(heads)
        return self._install(plan, draft, copies, {}, activate, trainable)

    def load(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        activate: bool = True,
        trainable: bool = False,
        head: Head_ = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        allow_bin: bool = False,
        replace: bool = False,
    ) -> Kit:
        """Add the adapters of a file; see `adapterkit.load`."""
        self._check_head(head)
        bundle = reader.read(
            source, self.blueprint, revision=revision, local_files_only=local_files_only, allow_bin=allow_bin
        )
        contents = bundle.contents
        if name is not None and len(contents) != 1:
            found = listing(content.name for content in contents)
            raise ConfigError(
                Problem("several-adapters", f"the file holds {len(contents)} adapters: {found}", "name")
            )
        for content in contents:
            self._members.check_name(name or content.name, replace, isinstance(content.config, FusionConfig))
        made = [assemble(self.blueprint, content, name or content.name, head) for content in contents]
        before, active = (dict(self._adapters), self.shared), (self._active, self._skipped)
        try:
            for new in made:
                self._install(
                    new.plan, new.draft, new.heads, new.poolers, activate and not bundle.setup, trainable
                )
            for group in sharing.groups_in(contents):
                self.share(*group)
            if activate and bundle.setup is not None:
                self.activate(bundle.setup, bundle.skip_layers)
        except BaseException:
            self._members.back(*before)
            self._active = None
            if len(self):
                self._act(*active)
            raise
        return self

    @alone
    def _install(
        self,
        plan: Plan,
        draft: Draft,
        heads: dict[Head, nn.Module],
        poolers: dict[Head, nn.Module],
        activate: bool,
        trainable: bool,
    ) -> Kit:
        """Put a complete adapter into the model: all of it or nothing."""
        self._members.refuse_merged("attach")
        if trainable:
            self._members.refuse_late(plan.slots[0].module)
        old = self._adapters.get(plan.name)
        if old is not None:
            self._members.refuse_sharded("replace")
            self._members.refuse_used("replace", self._active, plan.name)
        adapter = Adapter.made(plan, draft, heads, poolers)
        before = dict(self._adapters), self.shared
        try:
            self._members.exchange(old, adapter)
            adapter.require_grad(trainable)
            if activate or self._active == fusing.setup_of(adapter):
                self.activate(fusing.setup_of(adapter))
            elif adapter.name in names(self._active):
                self._act(self._active, self._skipped)
        except BaseException:
            self._members.back(*before)
            if len(self):
                self._act(self._active, self._skipped)
            raise
        report.log(plan)
        return self

    def _heads(self, head: Head_) -> tuple[Head, ...]:
        self._check_head(head)
        if head is True and not self.blueprint.heads:
            raise PlanError(Problem("no-head", f"{type(self.model).__name__} has no task head", "head"))
        return self.blueprint.heads if head else ()

    def _check_head(self, head: Head_) -> None:
        """Refuse a word that means nothing, and a head that no adapter could own.

        Raises: ConfigError, PlanError.
        """
        _check_word(head)
        loose = self.blueprint.loose if head else ()
        if loose:
            message = f"{type(self.model).__name__} keeps weights of its head in no module: {listing(loose)}"
            expected = "head=False, which leaves them as they are"
            raise PlanError(Problem("loose-head", message, "head", expected))

    # -- which adapter acts

    @property
    def active(self) -> Setup | None:
        """What acts in this thread."""
        override = self._runtime.override
        return self._active if override.programs is None else override.active

    def activate(self, setup: Setup | None, skip_layers: Layers = ()) -> None:
        """Make an adapter act in all threads, None: none; not in the layers that are skipped.

        Raises: PlanError: another thread is within a pass of the model.
        """
        self._members.refuse_merged("activate")
        setup, skipped = composition.read(setup), layers_of(skip_layers, "skip_layers")
        if self._programs(setup, skipped) is not self._runtime.programs:
            self._members.refuse_running("activate", self._active)
        self._act(setup, skipped)

    def _act(self, setup: Setup | None, skipped: Layers = ()) -> None:
        self._members.run(self._programs(setup, skipped))
        self._active, self._skipped = setup, skipped

    def _programs(self, setup: Setup | None, skip_layers: Layers = ()) -> Programs:
        composition.check(setup)
        key = setup, skip_layers, tuple(self._adapters.values())
        found = self._compiled.get(key)
        if found is None:
            found = programs(setup, self, self.blueprint, self._entries, skip_layers)
            if len(self._compiled) >= 64:
                self._compiled = {}
            self._compiled[key] = found
        self._top.expect(self.model, found)
        return found

    @contextmanager
    def using(
        self,
        setup: Setup | None,
        skip_layers: Layers = (),
        rows: Sequence[Setup | int | None] | torch.Tensor | None = None,
        task_ids: Sequence[Setup | int] | torch.Tensor | None = None,
    ) -> Iterator[Kit]:
        """Let another adapter or setup act, in this thread and block only.

        Args: rows: for each example the child of `Route` that it takes, by name or number; None or -1: none.
            task_ids: the same for `MultiTask`, where each example has a task.
        Raises: CompositionError: the setup has no meaning, a row names no child of it, or the block of a
            generator or task lies across it in this thread.
        """
        refuse_override(self.model)
        setup = composition.read(setup)
        with self._runtime.changing:
            self._members.refuse_merged("using")
            own = self._programs(setup, layers_of(skip_layers, "skip_layers"))
            index = chosen(setup, rows, task_ids, next(self.model.parameters()).device)
            block = opened(self._runtime, own, setup, *index)
        try:
            yield self
        finally:
            leave(self._runtime.override.flow)  # a forward pass may have ended by an exception
            closed(self._runtime, block)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with the batch repeated for Parallel; rows follow their examples through beams."""
        return generating.generate(self.model, self._top, args, kwargs)

    @contextmanager
    def disabled(self) -> Iterator[Kit]:
        """Let no adapter act, in this thread and block only."""
        with self.using(None):
            yield self

    # -- training

    def train(self, *names: str) -> Kit:
        """Let the tensors of these adapters (default: all) be trained."""
        return self._require_grad(names, True)

    def freeze(self, *names: str) -> Kit:
        """Let the tensors of these adapters (default: all) not be trained."""
        return self._require_grad(names, False)

    def _require_grad(self, names: tuple[str, ...], wanted: bool) -> Kit:
        self._members.require_grad([self[name] for name in names or tuple(self)], wanted)
        return self

    # -- sharing

    def share(self, *names: str) -> Kit:
        """Let adapters have tensors in common, those of the first; heads stay their own.

        MTL-LoRA has A and B in common, and the task's own matrix and mixture for itself; all other methods
        share everything. Make the optimizer after this: parameters are replaced.
        Raises: PlanError: they are of other methods, slots or shapes.
        """
        self._members.refuse_altered("share")
        sharing.share(self._groups, names, self, self.blueprint)
        return self

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Names of the adapters that have tensors in common, group by group."""
        return self._groups.names

    def unshare(self, *names: str) -> Kit:
        """Give adapters (default: all that share) tensors of their own again, with the same numbers."""
        self._members.refuse_altered("unshare")
        sharing.unshare(self._groups, names, self, self.blueprint)
        return self

    def to(
        self, name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> Kit:
        """Move the tensors of one adapter, and of those with which it shares some.

        Raises: PlanError: that is no type.
        """
        wanted = None if dtype is None else dtype_named(dtype)
        self._members.refuse_sharded("to")
        for adapter in [self[member] for member in self._groups.of(self[name].name)]:
            for address, module in adapter.modules().items():  # a head has the type of the model's own
                is_copy = address in adapter.heads or address in adapter.poolers
                module.to(device=device, dtype=None if is_copy else wanted)
        return self

    # -- fusion

    def fuse(
        self,
        *names: Setup,
        config: str | Mapping[str, Any] | FusionConfig = "dynamic",
        name: str | None = None,
        seed: int | None = None,
        trainable: bool = True,
    ) -> Kit:
        """Make the weights that `Fuse(*names)` needs, at every place where all of the fused have a unit.

        Args: names: of the adapters, or one `Fuse` of them. config: "dynamic", "static", options or a config.
            name: of the weights, 'a+b' if none is given.
        Raises: CompositionError, ConfigError, PlanError: nothing is changed then.
        """
        match names:
            case (Fuse() as whole,):
                setup = Fuse(*whole.children, name=name or whole.name)
            case _:
                setup = Fuse(*names, name=name)
        self._members.check_name(setup.name, replace=False, fusion=True)
        fused = [self[child] for child in setup.fused]
        made = fusing.config_of(fused, config)
        plan, draft = prepare(self.blueprint, made, setup.name, (), True, seed)
        fusing.cast(plan, draft, self.model, fused)
        return self._install(plan, draft, {}, {}, activate=False, trainable=trainable)

    def fusion_loss(self) -> torch.Tensor:
        """What the active fusions add to the loss (Pfeiffer et al. 2021, section 3.2): a scalar."""
        found = {block.name for block in composition.blocks(self.active) if isinstance(block, Fuse)}
        if not found:
            raise NotAttachedError(Problem("not-active", "no fusion is active", "fusion_loss"))
        return torch.stack([fusing.loss(self[name]) for name in sorted(found)]).sum()

    @contextmanager
    def record(self) -> Iterator[Record]:
        """Keep scores of gates and attentions of fusions of the forward passes in this thread and block."""
        override = self._runtime.override
        before, override.record = override.record, Record()
        try:
            yield override.record
        finally:
            override.record = before

    def eject(self, name: str) -> Kit:
        """Turn the prefixes of an adapter into flat ones, trained without the MLP that made them.

        Outputs stay the same, bit for bit.
        Raises: PlanError: the adapter has no prefix that is not flat.
        """
        adapter = self[name]
        self._members.refuse_altered("eject")
        self._groups.refuse_shared(name, "eject")
        plan, draft = swapping.flat(adapter, self.blueprint)
        heads, poolers = self._members.kept(adapter)
        return self._install(plan, draft, heads, poolers, activate=False, trainable=adapter.trainable)

    def average(
        self,
        adapters: Mapping[str, float] | Sequence[str],
        *,
        name: str,
        strategy: averaging.Strategy = "linear",
        normalize: bool = True,
        rank: int | None = None,
        density: float = 1.0,
        seed: int | None = None,
        head: Head_ = "auto",
        activate: bool = False,
        trainable: bool = False,
        replace: bool = False,
    ) -> Kit:
        """Add the weighted average of adapters, an adapter like any other.

        Args:
            adapters: name -> weight, or names alone for equal weights.
            strategy: `linear` and `svd` add up the changes of weights, `ties`, `dare` and `magnitude` what is
                left of them; `negate_b` averages tensors, with the sign of a weight in the up-projection.
                What is no change of a weight is averaged tensor by tensor, by `linear`.
            normalize: divide the weights by their sum.
            rank: of the result, for all strategies but `linear` and `negate_b`; None: as large as is exact.
            density: the part of every change that `ties`, `dare` and `magnitude` keep.
            seed: what `dare` drops.
            head: average the task heads too.
        Raises: ConfigError, PlanError: nothing is changed then.
        """
        self._members.refuse_altered("average")
        self._members.check_name(name, replace)
        how = averaging.how_of(strategy, rank, density, seed)
        weights = averaging.weights_of(adapters)
        weighted = [(self[child], weight) for child, weight in weights.items()]
        content = averaging.average(weighted, self.blueprint, how, normalize=normalize, head=head)
        has_heads = bool(content.heads) or not self.blueprint.heads
        made = assemble(self.blueprint, content, name, "auto" if has_heads else False)
        return self._install(made.plan, made.draft, made.heads, made.poolers, activate, trainable)

    # -- merging and leaving

    @property
    def merged(self) -> str | None:
        """Name of the adapter that is folded into the weights."""
        return self._members.merged

    @alone
    def merge(self, name: str) -> Kit:
        """Fold an adapter into the weights; `unmerge` gives the exact bits back.

        Raises: PlanError: it cannot be folded in exactly, or another thread is within a pass of the model.
        """
        self._members.refuse_altered("merge")
        adapter = self[name]
        self._members.refuse_used("merge", self._active)
        merging.check(self.model, adapter)
        programs = self._programs(name)
        self._originals = merging.fold(self.model, adapter)
        # the heads stay the adapter's own; its units are in the weights now
        self._members.run({path: p for path, p in programs.items() if p.instead})
        adapter.merged = True
        return self

    @alone
    def unmerge(self) -> Kit:
        """Undo `merge`: the weights get the bits back that they had."""
        name = self.merged
        if name is None or self._originals is None:
            raise PlanError(Problem("not-merged", "no adapter is merged"))
        self._members.refuse_sharded("unmerge")
        self._members.refuse_running("unmerge", name)
        merging.restore(self.model, self._originals)
        self._originals = None
        self._adapters[name].merged = False
        self._act(self._active, self._skipped)
        return self

    @alone
    def merge_and_detach(self, name: str) -> nn.Module:
        """Fold an adapter in for good and remove every trace of the kit: a plain model.

        Raises: PlanError: it cannot be folded in exactly, or another library wrapped a host on top; nothing
            is changed then.
        """
        adapter = self[name]
        self._members.refuse_altered("merge_and_detach", name)
        self._members.check_unwrapped()
        self._members.refuse_used("merge_and_detach", self._active)
        if not adapter.merged:
            self.merge(name)
        merging.keep_heads(adapter, self.blueprint)
        adapter.merged = False
        self._originals = None
        self._take_all()
        return self.model

    @alone
    def detach(self, name: str | None = None) -> nn.Module:
        """Remove one adapter, or all: the model is as if they had never been attached.

        Raises: PlanError: a block of `using`, or a pass in another thread, lets it act; the model is sharded.
        """
        self._members.refuse_sharded("detach")
        if name is None:
            self._members.refuse_used("detach", self._active, *self)
            if self.merged:
                self.unmerge()
            self._take_all()
            return self.model
        adapter = self[name]
        self._members.refuse_used("detach", self._active, name)
        if adapter.merged:
            self.unmerge()
        self._members.refuse_merged("detach")
        fusing.refuse_used(name, self._adapters, "detach")
        if len(self._adapters) == 1:
            self._take_all()
            return self.model
        self._members.take(adapter)
        self._act(None if name in names(self._active) else self._active, self._skipped)
        return self.model

    def _take_all(self) -> None:
        self._members.take_all()
        self._active = None

    # -- files and reports

    def save(
        self,
        dir: str | Path,
        name: str | None = None,
        *,
        setup: Setup | None = None,
        head: Head_ = "auto",
        format: writer.Format = "adapterkit",
    ) -> Path:
        """Write one adapter, or all that a setup names, to a directory.

        `name` may be left out if there is only one. A setup is saved with the tensors that its adapters
        share, and with the layers that it skips if it is the active one.
        """
        _check_word(head)
        if setup is not None:
            return self._save_setup(Path(dir), name, setup, head, format)
        adapter = self[self._only(name)]
        return writer.write(Path(dir), adapter, self._adapters, self.blueprint, head, format)

    def _save_setup(self, directory: Path, name: str | None, setup: Setup, head: Head_, format: str) -> Path:
        """Write a setup with its adapters.

        Raises: CompositionError, NotAttachedError: it has no meaning here.
        """
        wanted = setups.asked(setup, name, format)
        for own in composition.names(wanted):
            self[own]  # that it is there
        skipped = tuple(self._skipped) if wanted == self._active else ()
        bundle = Bundle((), wanted, skipped)
        return writer.write_setup(
            directory, bundle, self._adapters, self.shared, self.blueprint, head, format
        )

    def swap(
        self, name: str, path: str | Path, *, revision: str | None = None, allow_bin: bool = False
    ) -> Kit:
        """Give an attached adapter the weights of a file, in place: nothing is compiled or traced again.

        Raises: FileFormatError: the file holds another method, slots or shapes; nothing is changed.
        """
        self._members.refuse_altered("swap")
        found = reader.read(
            path, self.blueprint, revision=revision, local_files_only=False, allow_bin=allow_bin
        ).contents
        if len(found) != 1:
            raise ConfigError(Problem("several-adapters", f"the file holds {len(found)} adapters", "path"))
        self._groups.refuse_shared(name, "swap")
        swapping.swap(self[name], found[0], self.blueprint)
        return self

    def _only(self, name: str | None) -> str:
        if name is not None:
            return name
        if len(self._adapters) == 1:
            return next(iter(self._adapters))
        raise ConfigError(Problem("which-adapter", f"there are {len(self)} adapters", "name", listing(self)))

    def verify(self, **inputs: Any) -> Liveness:
        """Which tensors of the active adapter move no output and get no gradient on these inputs."""
        setup = self.active
        if setup is None:
            raise NotAttachedError(Problem("not-active", "no adapter is active", "verify"))
        self._members.refuse_altered("verify")
        # the adapters that are fused are not trained with the fusion
        own = [self[name] for name in names(setup)][: 1 if isinstance(setup, Fuse) else None]
        return examine(self.model, trained(own), inputs)

    def status(self) -> report.Status:
        """The state of every adapter, as a dataclass with `to_dict()`."""
        return report.status(self.model, self.blueprint, self._adapters, self._active, self.merged)

    def summary(self) -> str:
        """A table of the adapters."""
        return report.table(self.status())

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return report.html(self.status())
