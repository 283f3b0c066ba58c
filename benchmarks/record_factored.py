"""Records what TransformerLens 3.9.0's FactoredMatrix returns, for tests/model/test_factored.py.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_factored.py > tests/model/recorded_factored.py
"""

import sys
import textwrap
from pathlib import Path

from transformer_lens import FactoredMatrix

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "model"))
from parity_factored import SHAPES, factors, values


def main() -> None:
    print('"""What TransformerLens 3.9.0\'s FactoredMatrix returns; written by benchmarks/record_factored.py."""\n')
    print("# By factors and operation: shape, then every number.")
    print("# fmt: off")
    print("RECORDED = {")
    for name in SHAPES:
        print(f'    "{name}": {{')
        for what, found in values(FactoredMatrix(*factors(name))).items():
            numbers = [round(float(x), 6) for x in found.flatten()]
            print(f'        "{what}": ({tuple(found.shape)}, [')
            print(textwrap.fill(", ".join(map(str, numbers)), 118, initial_indent=" " * 12, subsequent_indent=" " * 12))
            print("        ]),")
        print("    },")
    print("}")


if __name__ == "__main__":
    main()
