"""Ctrl-C before a script has come to run."""

import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT

SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_during_the_imports(script, tmp_path):
    """They hang here, in the place of seconds that libraries take."""
    (tmp_path / "numpy.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, script, "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # this process may have it ignored
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == f"{script.name}: interrupted\n" and process.returncode == 130
