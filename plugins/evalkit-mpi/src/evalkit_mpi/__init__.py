"""The backend ``mpicomm`` of evalkit: jobs on the ranks of an MPI program.

``python -m evalkit_mpi script.py`` runs a script on one rank, while the others serve it.
"""
