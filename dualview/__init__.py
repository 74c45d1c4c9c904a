from dualview.geometry import *
