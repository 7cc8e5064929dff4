"""What rows of cases.yaml start from. Each function makes files in `work`; what is slow is made once, in `cache`."""

from __future__ import annotations
