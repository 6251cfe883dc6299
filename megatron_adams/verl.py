"""verl's plugin: adams is registered at the first call that asks for it.

verl imports it, in every process, as an entry point of the group verl.plugins; where this package
was not installed by pip, as a module that VERL_USE_EXTERNAL_MODULES names. Megatron is left as it
is where another optimizer is asked for. VERL_USE_EXTERNAL_PLUGINS=none turns it off.
"""

from megatron_adams import autoregister

autoregister.install_from_environment()
autoregister.install()
