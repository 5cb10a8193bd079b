# SPDX-License-Identifier: Apache-2.0
"""A parameter server on Ray: tables of ids whose rows are dealt out to processes, on one machine or many.

`ParameterServer.create` starts it, `ParameterServer.attach` finds it, and each worker pulls and pushes with a
`Client` of its own. Needs the extra ``ray``.
"""

from nb_sparse_adam._src.parameter_server.client import Client
from nb_sparse_adam._src.parameter_server.server import ParameterServer
from nb_sparse_adam._src.parameter_server.spec import TableSpec

__all__ = ["Client", "ParameterServer", "TableSpec"]
