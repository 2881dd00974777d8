"""The factors that decide whether a frozen graph may be used: the model, the machine and the toolchain.

Everything here returns plain JSON values that are the same in every process, for every user, folder, host and
device index. Nothing is imported here, so that importing the package stays free of torch.
"""
