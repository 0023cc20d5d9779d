import sys
from pathlib import Path

# So that tests, and the processes that they start, find `toy_recipe`.
sys.path.insert(0, str(Path(__file__).parent))
