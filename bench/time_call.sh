#!/bin/bash
# An archive_command around another: writes down what an empty command took and what the other one took, in microseconds.
# Arguments: the file to write to, the command.
began=$EPOCHREALTIME
sh -c /bin/true
empty=$EPOCHREALTIME
sh -c "$2"
code=$?
ended=$EPOCHREALTIME
echo "$((${empty/./} - ${began/./})) $((${ended/./} - ${empty/./})) $code" >>"$1"
exit $code
