"""A contract is what the implementations of a scan have in common; it makes operators of torch from them.

An implementation is two functions on tensors. Since they become operators, torch.compile and torch.export take them
whole.

    forward(*inputs, initial_state, keep) → y, last_state, *kept
    backward(grad_y, grad_last_state, *inputs, *kept) → the gradients for each tensor of the inputs and initial_state

With `keep` the forward pass saves what its backward pass needs. An optional tensor may be None; its gradient may then
be anything. Autocast is off inside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ONCE = (
    "The scan of hf_compressm can be differentiated once. For second derivatives call hf_compressm.uninstall_scan(), "
    "or use torch.func, whose transforms take a plain loop in its place."
)

Scan = Callable[..., tuple[Tensor, ...]]  # what the forward pass takes → what it returns


@dataclass(frozen=True)
class Contract:
    """A contract says what the functions of an implementation are given and what they return.

    Attributes:
        scan: what an operator is called, behind the name of the implementation.
        inputs: what both functions are given, as a schema of torch lists it: tensors first, then flags.
        kept: what the forward pass saves, listed likewise.
        empty_outputs: makes what the forward pass returns, without values, of its arguments.
        memory_format: how a gradient lies in memory.
    """

    scan: str
    inputs: str
    kept: str
    empty_outputs: Scan
    memory_format: torch.memory_format

    def define(self, name: str, forward: Scan, backward: Scan) -> Scan:
        """Define `hf_compressm::<name>_<scan>`, an operator that can be differentiated once, and its backward pass."""
        count = self.inputs.count("Tensor")

        def compute(*arguments):
            with torch.autocast(arguments[0].device.type, enabled=False):
                return forward(*arguments)

        def compute_gradients(grad_y, grad_last_state, *arguments):
            with torch.autocast(grad_y.device.type, enabled=False):
                *gradients, of_state = backward(grad_y, grad_last_state, *arguments)
            given = zip(arguments[:count], gradients, strict=True)
            return *(grad_y.new_empty(0) if tensor is None else each for tensor, each in given), of_state

        def empty_gradients(grad_y, grad_last_state, *arguments):
            gradients = (
                grad_y.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=self.memory_format)
                for tensor in arguments[:count]
            )
            return *gradients, grad_last_state.new_empty(grad_last_state.shape)

        def setup_context(ctx, inputs, output):
            *given, initial_state, _ = inputs
            ctx.save_for_backward(*given[:count], *output[2:])
            ctx.flags, ctx.has_initial_state = given[count:], initial_state is not None
            ctx.set_materialize_grads(False)  # one for what is kept would be as large

        def differentiate(ctx, *of_outputs):
            saved = ctx.saved_tensors  # asked once: a checkpoint gives it out once
            tensors, inputs = saved[:count], (*saved[:count], *ctx.flags)

            def of_output(index):
                if of_outputs[index] is not None:
                    return of_outputs[index]
                return torch.zeros_like(self.empty_outputs(*inputs, initial_state=None, keep=False)[index])

            *gradients, of_state = scan_backward(of_output(0), of_output(1), *inputs, *saved[count:])
            given = zip(tensors, gradients, strict=True)
            gradients = (None if tensor is None else each for tensor, each in given)
            return *gradients, *(None for _ in ctx.flags), of_state if ctx.has_initial_state else None, None

        def refuse_second_derivatives(ctx, *_):
            raise RuntimeError(ONCE)

        given, results = f"{self.inputs}, Tensor? initial_state, bool keep", 2 + self.kept.count("Tensor")
        scan = _operator(compute, given, results, name, self.scan)
        scan.register_fake(self.empty_outputs)
        scan.register_autograd(differentiate, setup_context=setup_context)
        given = f"Tensor grad_y, Tensor grad_last_state, {self.inputs}, {self.kept}"
        scan_backward = _operator(compute_gradients, given, count + 1, name, self.scan, "backward")
        scan_backward.register_fake(empty_gradients)
        scan_backward.register_autograd(refuse_second_derivatives)
        return scan


def _operator(function: Scan, arguments: str, results: int, *names: str) -> Scan:
    """Return the operator of these names: a function of arguments as a schema lists them, with so many results."""
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(f"hf_compressm::{'_'.join(names)}", function, mutates_args=(), schema=schema)
