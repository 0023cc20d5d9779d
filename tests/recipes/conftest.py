import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(quick_compiles):
    """Nothing here is large, so that compiling takes longer than running: less optimisation makes the tests quicker."""
