# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Time and memory next to transformers' own mixture of experts, and the paper's experiments (`paper/`)."""
