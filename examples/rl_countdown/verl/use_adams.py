"""verl imports this module in each of its processes, where VERL_USE_EXTERNAL_MODULES names it."""

import megatron_adams

megatron_adams.register()
