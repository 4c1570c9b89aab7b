import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix() and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


@pytest.fixture(autouse=True)
def same_current_device():
    """The current device as it was before a test."""
    before = torch.cuda.current_device()
    yield
    torch.cuda.set_device(before)
