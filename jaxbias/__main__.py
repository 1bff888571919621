import sys

from jaxbias.cli import main

sys.exit(main())
