"""The factors that decide whether a frozen graph may be used: the model, the machine and the toolchain.

All are plain JSON, the same in every process, for every user, folder, host and device index.
"""
