"""Options and fixtures of all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# a busy machine is no fault of an example
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the expected outputs; review the diff"
    )
    parser.addoption("--spec", help="only these rows of the laws: bert,llama")
    parser.addoption("--method", help="only these methods of the laws: lora,dora")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether expected outputs are rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))
