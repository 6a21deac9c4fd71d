"""Operations that write into the tensor they are given."""

from __future__ import annotations

from torch import fx, nn

from ntkit.kernel.infinite import pointwise
from ntkit.kernel.infinite.nodes.call import Call
from ntkit.kernel.infinite.values import Known

# Names of functions and methods that give the memory of their input under another name.
_VIEWS = {
    "contiguous", "dropout", "flatten", "permute", "reshape", "squeeze", "swapaxes", "transpose", "unsqueeze", "view",
}  # fmt: skip


def require_sole_user(call: Call) -> None:
    """Refuse writing into a tensor that others read afterwards: the graph does not show them the new values.

    Raises:
        ModelError: if somebody else reads it.
    """
    node: fx.Node = call.first
    while True:
        if isinstance(call.reader.values[node], Known):
            call.refuse("it writes into its inputs: use the form that is not in place")
        if len(node.users) > 1:
            call.refuse("it writes into a tensor that is used elsewhere, too: use the form that is not in place")
        if not _shares_memory(call, node):
            return
        node = node.all_input_nodes[0]


def _shares_memory(call: Call, node: fx.Node) -> bool:
    """Whether a node may give the memory of its input under another name."""
    if node.op == "call_module":
        module = call.reader.modules[str(node.target)]
        return isinstance(module, (nn.Identity, nn.Flatten, *pointwise.DROPOUTS)) or getattr(module, "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op.startswith("call") and (name in _VIEWS or name.endswith("_"))
