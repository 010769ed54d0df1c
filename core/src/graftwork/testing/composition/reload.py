"""Read stored models again, in a process of its own: ``python -m graftwork.testing.composition.reload FILE``.

The file is JSON, see :func:`graftwork.testing.composition.reading.changed`; the numbers of those that are read
otherwise than they were are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from graftwork.testing.composition.reading import changed
from graftwork.train.job import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(changed(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
