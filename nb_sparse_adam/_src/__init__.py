# SPDX-License-Identifier: Apache-2.0
"""The library itself. All of it is private: what users import is in the modules beside this folder."""
