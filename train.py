#!/usr/bin/env python3
"""Train timm models and dynamic models on one or many devices.

    python train.py --help
    accelerate launch train.py --model focusnet_resnet18 --focus-baseline resnet18.tv_in1k --data-dir IMAGENET
"""
import sys

from timm_dynamic.training import train_main

if __name__ == '__main__':
    sys.exit(train_main())
