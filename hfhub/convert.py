#!/usr/bin/env python3
"""Convert the authors' weights into a folder for the Hugging Face Hub: safetensors, config.json and a model card.

    python hfhub/convert.py --help
    python hfhub/convert.py AUTHORS_FILE --model gfnet_resnet50_96
"""
import sys

from timm_dynamic.hub import convert_main

if __name__ == '__main__':
    sys.exit(convert_main())
