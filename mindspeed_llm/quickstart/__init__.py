"""The bundled tiny model of `quickstart.sh`: its texts, makers, gates and the table it ends with."""
