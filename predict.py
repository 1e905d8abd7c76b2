#!/usr/bin/env python3
"""Predict the classes of images with timm models and dynamic models on one or many devices.

    python predict.py --help
    python predict.py --model resnet18.tv_in1k --data-dir IMAGES --topk 5
    python predict.py --model local-dir:FOLDER --data-dir IMAGES --budget 1 --results-file predictions.csv
"""
import sys

from timm_dynamic.evaluation import predict_main

if __name__ == '__main__':
    sys.exit(predict_main())
