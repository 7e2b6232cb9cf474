"""Compile a kernel for an H100 or H200 on a machine without a GPU, in a process where Triton does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SCRIPT = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module, name, signature, constexprs, options = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert compiled.asm["cubin"]
print(compiled.asm["ptx"])
"""


def compiled_ptx(
    kernel: str, signature: dict[str, str], constexprs: dict[str, Any], cache: Path, **options: Any
) -> str:
    """The PTX of ``kernel`` ("module:name") for sm_90, which ptxas took as well; ``cache`` is an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([*kernel.split(":"), signature, constexprs, options])],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
