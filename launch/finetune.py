"""Fine-tune: `accelerate launch --quiet launch/finetune.py --config configs/finetune_demo.yaml`."""

import sys

from bioscan_xla.finetune import main

if __name__ == "__main__":
    sys.exit(main())
