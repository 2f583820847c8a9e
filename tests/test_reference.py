"""Every module of a paper gives the outputs and gradients of the authors' own code.

`pytest tests/test_reference.py --reference-dir DIR` runs the same checks on another folder of the
form DIR/<system>/*.npz|json; sizes come from `meta`, a file that DIR lacks is skipped by name. The
checks of each system stand in tests/reference_checks.
"""

from reference_checks.bita import *  # noqa: F403
from reference_checks.captions import *  # noqa: F403
from reference_checks.cfitr import *  # noqa: F403
from reference_checks.cfitr_search import *  # noqa: F403
from reference_checks.common import vectors  # noqa: F401  (a fixture)
from reference_checks.pe_rsitr import *  # noqa: F403
from reference_checks.pir import *  # noqa: F403
from reference_checks.pir_clip import *  # noqa: F403
