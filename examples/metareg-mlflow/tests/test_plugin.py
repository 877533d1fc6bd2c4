"""metareg's conformance kit, one test for each check that applies."""

import pytest

from metareg.testing import Check, checks

pytest.importorskip("mlflow")


@pytest.mark.parametrize("check", checks("observers", "mlflow"), ids=str)
def test_conformance(check: Check) -> None:
    check()
