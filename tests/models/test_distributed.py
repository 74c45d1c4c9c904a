"""The plans for tensor parallelism and FSDP2, carried out by two processes: see `tests.models.two_processes`."""

import pytest

from tests.fresh import run_two


@pytest.mark.more
@pytest.mark.parametrize("how", ["tp", "fsdp"])
def test_two_processes_share_a_model(how, tmp_path):
    code = "import sys; from tests.models.two_processes import main; main(*sys.argv[1:])"
    for rank, process in enumerate(run_two(code, how, str(tmp_path))):
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.count(f"{rank} {how}") == 4, process.stdout
