"""All that optimizers keep of parameters is found here, in one optimizer or in several that hold each other.

Optimizers around others (Muon beside AdamW, Lookahead, SAM) keep them in their attributes, and state of their own
beside them. What is found by a parameter follows a resize; what belongs to one in another way is refused.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from ..engines import check_replaceable, unwrap_optimizer

REFUSED = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo", "LBFGS")
VALUE = ""  # the key under which a tensor that a table keeps by itself is shown as a state


class OptimizerParts:
    """The parts are found once in what trains a model; attributes, lists, tuples, sets and dicts are searched.

    Args:
        optimizer: an optimizer, an object with optimizers in its attributes, a list of them, or None.

    Attributes:
        optimizers: where it was found → optimizer, the outermost first.
        groups: where it was found → parameter group; one that several optimizers share is there once.
        tables: where it was found → dict by parameter: the `state` of every optimizer, and others like it.
        others: (where it was found, any other tensor, or number, which may be the `id` of a parameter).
    """

    def __init__(self, optimizer):
        self.optimizers: dict[str, Optimizer] = {}
        self.groups: dict[str, dict] = {}
        self.tables: dict[str, dict] = {}
        self.others: list[tuple[str, Tensor | int]] = []
        self._seen: dict[int, object] = {}  # it keeps what a property returned alive, so that no other has its id
        optimizer = unwrap_optimizer(optimizer)
        is_of_no_known_kind = not _is_optimizer(optimizer) and hasattr(optimizer, "__dict__")
        self._search(vars(optimizer) if is_of_no_known_kind else optimizer, type(optimizer).__name__)

    def _search(self, value, where: str) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if _is_optimizer(value):
            self._search_optimizer(value, where)
        elif isinstance(value, Mapping):
            if any(isinstance(key, Tensor) for key in value):
                self.tables[where] = value
            for key, entry in value.items():
                if not isinstance(key, Tensor):
                    self._search(key, f"{where}: a key")
                    self._search(entry, f"{where}.{key}")
        elif isinstance(value, list | tuple | set | frozenset):
            for position, entry in enumerate(value):
                self._search(entry, f"{where}[{position}]")
        elif isinstance(value, Tensor) or type(value) is int:
            self.others.append((where, value))

    def _search_optimizer(self, optimizer: Optimizer, where: str) -> None:
        self.optimizers[where] = optimizer
        if id(optimizer.state) not in self._seen:
            self._search(optimizer.state, f"{where}.state")
            self.tables[f"{where}.state"] = optimizer.state  # even while it is empty
        for position, group in enumerate(optimizer.param_groups):
            if id(group) not in self._seen:
                self._seen[id(group)] = group
                place = f"{where}.param_groups[{position}]"
                self.groups[place] = group
                for key, value in group.items():
                    if key != "params":
                        self._search(value, f"{place}.{key}")
        for name, value in vars(optimizer).items():
            if name != "param_groups":
                self._search(value, f"{where}.{name}")

    def check(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Refuse optimizers that could not follow a resize of these parameters.

        Args:
            parameters: the parameters by what errors call them.

        Raises:
            ValueError: an optimizer is layer-wise or keeps one flat state, none holds a trainable parameter, or one
                keeps something of a parameter that is not found by it; or a parameter carries gradient hooks.
        """
        for optimizer in self.optimizers.values():
            if type(optimizer).__name__ in REFUSED:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps state that is tied to whole parameters or to the order of all "
                    "of them; use AdamW, SGD, Adafactor or another optimizer with a state per parameter."
                )
        held = {parameter for group in self.groups.values() for parameter in group["params"]}
        for name, parameter in parameters.items():
            check_replaceable(name, parameter)
            if parameter.requires_grad and parameter not in held:
                raise ValueError(
                    f"the optimizer does not hold {name}, so it would silently stop learning. The optimizer was built "
                    "for other parameters, or before a checkpoint changed the state size: build it after loading, or "
                    "let Trainer build it (it may be overridden in create_optimizer, but not passed ready-made)."
                )
            for where, other in self.others:
                if _belongs_to(other, parameter):
                    raise ValueError(
                        f"{where} belongs to {name}, or has its shape, and could not follow a resize: optimizers have "
                        "to keep such values in a dict whose keys are the parameters, as torch's do in `state`."
                    )

    def states(self, parameter: nn.Parameter) -> dict[str, dict]:
        """Return what is kept of a parameter: table → state, where there is one."""
        return {where: as_state(table[parameter]) for where, table in self.tables.items() if parameter in table}

    def swap_parameter(self, old: nn.Parameter, new: nn.Parameter, states: Mapping[str, dict]) -> None:
        """Put `new` with its states in the place of `old`, at the same position, by which checkpoints are keyed."""
        for group in self.groups.values():
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        for where, table in self.tables.items():
            table.pop(old, None)
            if states.get(where):
                table[new] = from_state(states[where])


def as_state(entry) -> dict:
    """Return what a table keeps of a parameter as a state, key → value."""
    return entry if isinstance(entry, dict) else {VALUE: entry}


def from_state(state: dict):
    """Return what a table keeps of a parameter, given as a state."""
    return state.get(VALUE, state)


def _is_optimizer(value) -> bool:
    """Return whether a value can be used as an optimizer of torch, whatever its class."""
    return isinstance(value, Optimizer) or (hasattr(value, "param_groups") and hasattr(value, "state"))


def _belongs_to(value: Tensor | int, parameter: nn.Parameter) -> bool:
    if isinstance(value, Tensor):
        return value is parameter or (value.ndim > 0 and value.shape == parameter.shape)
    return value == id(parameter)
