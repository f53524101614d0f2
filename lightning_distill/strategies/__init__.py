"""Training on several processes; importing this makes ``role_ddp`` and ``role_fsdp2`` known to Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_distill.strategies.role_data_parallel import RoleDataParallel
from lightning_distill.strategies.role_fsdp2 import RoleFSDP2
from lightning_distill.strategies.supported import check_strategy

__all__ = ["RoleDataParallel", "RoleFSDP2", "check_strategy"]

for _name, _strategy in (("role_ddp", RoleDataParallel), ("role_fsdp2", RoleFSDP2)):
    if _name not in StrategyRegistry:
        _strategy.register_strategies(StrategyRegistry)
