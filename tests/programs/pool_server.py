"""A sum for each connection, made by one of four processes, which count together what they have done."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory


def begin(its_counter, its_memory):
    global counter, memory
    counter, memory = its_counter, its_memory


def add(total, number):
    with counter.get_lock():
        counter.value += 1
        # The same in memory of another kind.
        memory.buf[:8] = counter.value.to_bytes(8)
    return total + number


async def main():
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    memory = shared_memory.SharedMemory(create=True, size=1 << 20)
    done = 0
    with context.Manager() as manager, ProcessPoolExecutor(
            4, mp_context=context, initializer=begin, initargs=(counter, memory)) as pool:
        kept = manager.dict()

        async def serve(reader, writer):
            nonlocal done
            total = 0
            while line := await reader.readline():
                total = await asyncio.get_running_loop().run_in_executor(pool, add, total, int(line))
                done += 1
                if done % 500 == 0:
                    kept["done"] = done
                    if kept["done"] != done:
                        print("the manager has lost", done, flush=True)
                writer.write(b"%d\n" % total)
                await writer.drain()

        async def compare():
            while True:
                await asyncio.sleep(0.1)
                with counter.get_lock():
                    if int.from_bytes(memory.buf[:8]) != counter.value or counter.value < done:
                        print("the counts differ:", counter.value, bytes(memory.buf[:8]), done, flush=True)

        server = await asyncio.start_server(serve, "", 7000)
        async with server:
            await asyncio.gather(server.serve_forever(), compare())


if __name__ == "__main__":
    asyncio.run(main())
