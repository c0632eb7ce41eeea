# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""`python -m conversion` is `coe-convert`."""

import sys

from .cli import main


sys.exit(main())
