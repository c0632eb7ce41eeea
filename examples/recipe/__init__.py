# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What the training scripts have in common: data, the folder of a run, training, and what is reported."""
