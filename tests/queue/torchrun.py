"""Programs of two ranks, run by torchrun with gloo on this machine alone."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str | Path, results: Path, *options: str) -> list[dict]:
    """Run a script under torchrun with two ranks; return what each wrote."""
    results.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["--local-addr", "127.0.0.1", str(Path(__file__).parent / script), str(results)]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(2)]
