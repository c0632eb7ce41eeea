# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Servers with OpenAI's protocol: started, asked, and measured under load."""
