import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # tests never reach for a hub
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait must not spin

import torch

# As the runtimes have it. Both executors have quirks of their own: the notebooks run the profiling one.
torch._C._jit_set_profiling_mode(False)
