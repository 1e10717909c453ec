"""What the library must equal: upstream's code, pinned by version, unpacked beside the environment.

`load(OracleSpec.parse("ultralytics==8.4.190"))`, in a worker process, gives an Oracle to ask.
"""

from reference.bound import Bound
from reference.errors import FetchError, OracleError, RequestError
from reference.oracle import Location, Oracle, load, locate
from reference.pins import OracleSpec, Pin, read_pins

__all__ = [
    "Bound",
    "FetchError",
    "Location",
    "Oracle",
    "OracleError",
    "OracleSpec",
    "Pin",
    "RequestError",
    "load",
    "locate",
    "read_pins",
]
