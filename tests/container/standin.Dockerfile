# Stands in for NVIDIA's PyTorch image where no image registry is reachable: Debian with a Python and the locked torch.
FROM scratch
ADD debian.tar /
ENV PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN python3 -m venv /opt/python
COPY torch.txt /opt/python/torch.txt
RUN pip install --no-cache-dir -r /opt/python/torch.txt
