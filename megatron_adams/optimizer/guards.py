"""The RMS of each param's update, and the factors that a cap or a target derives from it.

A step that counts adds the squares of its updates to two integers for each param. A step with a cap
or a target reads one factor for each param. Both stay on the params' device, so that nothing waits
for the device. Used by adams.py and plan.py. Imports torch, update.py and tensors.py.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_adams.optimizer.tensors import local_part, shard_groups
from megatron_adams.update import update_factors, update_rms


class UpdateGuards:
    """The sums and factors of an optimizer's params. They are not part of its state.

    Args:
        params: all params, in the order of the groups.
        devices: the device of each param.
        whole_numels: for each param that is a shard, the number of elements of the whole param.

    Attributes:
        sums_of: param -> (2,) int64, as `count_squares` returns; a kernel adds to it.
        factor_of: param -> () fp32; a kernel reads it.
        rms: (num_params,) fp32; the RMS of the updates before factors. Set by `set_factors`.
        factors: (num_params,) fp32; the factors of the step. Set by `set_factors`.
    """

    rms: Tensor
    factors: Tensor

    def __init__(
        self,
        params: Sequence[Tensor],
        devices: Sequence[torch.device],
        whole_numels: Mapping[Tensor, int],
    ) -> None:
        self.params = list(params)
        # A rank may own no param, but it takes part in reductions.
        self._device = devices[0] if devices else torch.device("cpu")
        everywhere = dict.fromkeys([self._device, *devices])
        self._sums = {
            device: torch.zeros(len(params), 2, dtype=torch.int64, device=device)
            for device in everywhere
        }
        self._factors = {
            device: torch.ones(len(params), dtype=torch.float32, device=device)
            for device in everywhere
        }
        self.sums_of = {
            param: self._sums[device][i]
            for i, (param, device) in enumerate(zip(params, devices, strict=True))
        }
        self.factor_of = {
            param: self._factors[device][i]
            for i, (param, device) in enumerate(zip(params, devices, strict=True))
        }
        numels = [whole_numels.get(param, param.numel()) for param in params]
        self._numels = torch.tensor(numels, dtype=torch.int64, device=self._device)
        self._splits = _splits(self.params)

    def clear(self) -> None:
        """Forget what has been counted."""
        for sums in self._sums.values():
            sums.zero_()

    def sums(self) -> Tensor:
        """Return a copy of what has been counted on this rank: (num_params, 2) int64."""
        total = self._sums[self._device].clone()
        for device, sums in self._sums.items():
            if device != self._device:
                total += sums.to(self._device)
        return total

    def whole_rms(self, reduce_sums: Callable[[Tensor], None] | None) -> Tensor:
        """Return the RMS of the updates of whole params: (num_params,) fp32.

        Args:
            reduce_sums: turns the sums of shards into those of whole params, in place; None: those
                of DTensors are added up over the ranks of their meshes.
        """
        sums = self.sums()
        (reduce_sums or self._add_up_dtensors)(sums)
        return update_rms(sums, self._numels)

    def _add_up_dtensors(self, sums: Tensor) -> None:
        for group, rows in self._splits:
            index = torch.tensor(rows, dtype=torch.int64, device=sums.device)
            shards = sums[index]
            dist.all_reduce(shards, group=group)
            sums[index] = shards

    def set_factors(
        self,
        reduce_sums: Callable[[Tensor], None] | None,
        *,
        max_rms: float | None,
        match_rms: float | None,
    ) -> None:
        """Set the step's factors from what has been counted, without waiting for the device.

        Args:
            reduce_sums: as in `whole_rms`.
            max_rms, match_rms: as in `update_factors`.
        """
        self.rms = self.whole_rms(reduce_sums)
        self.factors = update_factors(self.rms, max_rms=max_rms, match_rms=match_rms)
        for factors in self._factors.values():
            factors.copy_(self.factors)


def _splits(params: Sequence[Tensor]) -> list[tuple[ProcessGroup, list[int]]]:
    """Return the groups that DTensors are split over, and their places among the params.

    In the order of the params, which is the same on all ranks.
    """
    rows: dict[ProcessGroup, list[int]] = {}
    for index, param in enumerate(params):
        for group in shard_groups(param):
            rows.setdefault(group, []).append(index)
    return list(rows.items())


class StepGuards:
    """The guards of an optimizer's last step, which are kept while its params stay the same.

    Attributes:
        current: the guards; None: no step had any.
        is_counted: the last step has counted its updates.
    """

    def __init__(self) -> None:
        self.current: UpdateGuards | None = None
        self.is_counted = False

    def begin(self, params: Sequence[Tensor], whole_numels: Mapping[Tensor, int]) -> UpdateGuards:
        """Return the guards of a step that counts, with nothing counted yet.

        Args:
            params: all of the optimizer's, in the order of the groups.
            whole_numels: as `UpdateGuards`.
        """
        known = self.current
        if known is None or [*map(id, known.params)] != [*map(id, params)]:
            devices = [local_part(param).device for param in params]
            self.current = known = UpdateGuards(params, devices, whole_numels)
        known.clear()
        self.is_counted = True
        return known

    def counted(self) -> UpdateGuards:
        """Return the guards of the last step.

        Raises:
            ValueError: it has not counted.
        """
        if self.current is None or not self.is_counted:
            raise ValueError(
                "the update RMS of a step that did not count it: set wants_update_rms = True "
                "before the step"
            )
        return self.current
