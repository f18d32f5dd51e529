"""What of the caller's environment a notebook sees: what a run needs, and nothing that a printed environment could give away."""

from __future__ import annotations

import re
from collections.abc import Mapping

NEEDED = re.compile(
    r"PATH|PATHEXT|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|TMPDIR|TEMP|TMP|VIRTUAL_ENV|LD_LIBRARY_PATH|SOURCE_DATE_EPOCH"
    r"|SYSTEMROOT|COMSPEC|(NO|HTTPS?|ALL)_PROXY"
    r"|(LC_|XDG_|PYTHON|CONDA_|OMP_|MKL_|OPENBLAS_|KMP_|TORCH|PYTORCH_|TRITON_|CUDA_|NVIDIA_|NCCL_|XLA_|PJRT_|TPU_|MPL|JUPYTER_"
    r"|IPYTHON|HF_|TQDM_|SSL_|BIGMODEL_)\w*",
    re.IGNORECASE,
)
SECRET = re.compile(r"TOKEN|SECRET|PASS(WORD|WD|PHRASE)?(_|$)|CREDENTIAL|AUTH|API_?KEY|PRIVATE|(ACCESS|_)KEY", re.IGNORECASE)
WITH_PASSWORD = re.compile(r"://[^/\s]*@")


def visible(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a notebook is given: known by name, without the name of a secret and without a password in an address."""
    return {
        name: value
        for name, value in environment.items()
        if NEEDED.fullmatch(name) and not SECRET.search(name) and not WITH_PASSWORD.search(value)
    }


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose name says that they are secret, where the value is long enough (8) not to be met by chance."""
    return {name: value for name, value in environment.items() if SECRET.search(name) and len(value) >= 8}
