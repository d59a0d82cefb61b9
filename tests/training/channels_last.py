"""A fault of oneDNN with torch alone: `python channels_last.py 4 8` corrupts the heap and dies, 8 16 does not.

The gradient of the weights of a 1x1 convolution with stride 2 in channels_last, by the kernel
jit_avx2_1x1_convolution_bwd_weights, writes beyond its memory where the channels are no multiple of 8 (torch 2.15.0).
On a processor with AVX-512, ONEDNN_MAX_CPU_ISA=AVX2 chooses that kernel.
"""

import sys

import torch

inputs, outputs = map(int, sys.argv[1:])
torch.manual_seed(0)
layer = torch.nn.Conv2d(inputs, outputs, 1, stride=2).to(memory_format=torch.channels_last)
for _ in range(200):
    images = torch.randn(16, inputs, 8, 8).to(memory_format=torch.channels_last)
    layer(images).square().sum().backward()
