import os
from pathlib import Path

from hypothesis import HealthCheck, settings

# Triton decides when it is first imported, by whatever test, whether its own functions run in Python. (Torch
# would know better whether there is a GPU, but takes seconds to import.)
if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A busy machine makes any example slow; time decides no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
