#!/usr/bin/env python3
"""Publish folders from convert.py or train.py --push-to-hub on the Hugging Face Hub, and verify the result.

    python hfhub/publish.py --help
    python hfhub/publish.py --all --dry-run
"""
import sys

from timm_dynamic.hub import publish_main

if __name__ == '__main__':
    sys.exit(publish_main())
