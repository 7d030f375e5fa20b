"""Faster ways to compute on a processor what torch computes too. One switch turns all of them off.

Set the environment variable `EGCNN_PLAIN=1`, or `egcnn_nb.fast.enabled = False` at run time.
A layer reads `enabled` each time it runs.
With the switch off every layer uses torch's own operations alone,
so that second derivatives, `torch.func` and `torch.jit.trace` work.
"""

import os

enabled: bool = os.environ.get("EGCNN_PLAIN", "") in ("", "0")
