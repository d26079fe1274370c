# SPDX-License-Identifier: Apache-2.0
"""AdamW's moments, and steps of AdamW's length along other directions."""
