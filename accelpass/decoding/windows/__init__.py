"""Windows of future tokens that the model computes anew at each step."""

from accelpass.decoding.windows.jacobi import Jacobi as Jacobi
from accelpass.decoding.windows.jacobi import jacobi as jacobi
from accelpass.decoding.windows.sjd import SpeculativeJacobi as SpeculativeJacobi
from accelpass.decoding.windows.sjd import sjd as sjd
