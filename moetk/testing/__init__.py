"""Laws for users' own parts, and hypothesis strategies to draw their inputs."""

from moetk.testing.check_banks import check_expert_bank as check_expert_bank
from moetk.testing.check_controllers import check_controller as check_controller
from moetk.testing.check_dispatchers import check_dispatcher as check_dispatcher
from moetk.testing.check_losses import check_loss as check_loss
from moetk.testing.check_routers import check_router as check_router
from moetk.testing.report import LawReport as LawReport
