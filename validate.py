#!/usr/bin/env python3
"""Evaluate timm models and dynamic models on one or many devices.

    python validate.py --help
    python validate.py --model resnet18.tv_in1k --data-dir IMAGENET --compare resnet34.tv_in1k
    python validate.py --model local-dir:FOLDER --data-dir IMAGENET --budget 1 2 --curve curve.png
"""
import sys

from timm_dynamic.evaluation import validate_main

if __name__ == '__main__':
    sys.exit(validate_main())
