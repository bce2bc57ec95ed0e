from armour_surgery.conversion import *  # noqa  temporary shim
