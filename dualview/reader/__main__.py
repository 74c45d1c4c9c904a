"""`python -m dualview.reader FOLDER`: train the tower and the embedded model from nothing."""

import argparse
from pathlib import Path

from dualview.reader.recipe import train_embedded

parser = argparse.ArgumentParser(prog="python -m dualview.reader", description=__doc__)
parser.add_argument("folder", type=Path, help="of the run; what is there already is not trained again")
parser.add_argument("--device", help="cpu or cuda; a GPU where there is one")

if __name__ == "__main__":
    options = parser.parse_args()
    train_embedded(options.folder, device=options.device)
