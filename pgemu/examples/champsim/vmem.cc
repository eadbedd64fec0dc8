/* ChampSim's VirtualMemory over page tables of pgemu; takes the place of src/vmem.cc. See README.md beside it.
 *
 * A child process (owner.py) has the machine and maps pages; walks read its tables in shared memory, without it.
 */
#include "vmem.h"

#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <sys/wait.h>
#include <vector>

#include "dram_controller.h"
#include "util/bits.h"

namespace
{
std::string setting(const char* name, const char* otherwise)
{
  const char* found = std::getenv(name);
  return found != nullptr ? found : otherwise;
}

/* Write or read all of it; false at an end. */
bool send(int file, const void* from, std::size_t size)
{
  auto* at = static_cast<const char*>(from);
  while (size > 0) {
    auto done = write(file, at, size);
    if (done <= 0)
      return false;
    at += done;
    size -= static_cast<std::size_t>(done);
  }
  return true;
}

bool receive(int file, void* to, std::size_t size)
{
  auto* at = static_cast<char*>(to);
  while (size > 0) {
    auto done = read(file, at, size);
    if (done <= 0)
      return false;
    at += done;
    size -= static_cast<std::size_t>(done);
  }
  return true;
}
} // namespace

VirtualMemory::VirtualMemory(champsim::data::bytes page_table_page_size, std::size_t page_table_levels, champsim::chrono::clock::duration minor_penalty,
                             MEMORY_CONTROLLER& dram_, std::optional<uint64_t>)
    : name("/pgemu-champsim-" + std::to_string(getpid())), minor_fault_penalty(minor_penalty), pt_levels(page_table_levels),
      pte_page_size(page_table_page_size)
{
  start_owner();
  int error = pgemu_shared_open(&shared, name.c_str());
  if (error == PGEMU_SHARED_OK) {
    std::vector<pgemu_shared_root> roots(4096);
    roots.resize(std::min(roots.size(), pgemu_shared_roots(&shared, roots.data(), roots.size())));
    error = PGEMU_SHARED_NO_SUCH;
    for (const auto& root : roots) {
      if (root.kind == PGEMU_ROOT_VM && root.number == 0)
        error = pgemu_shared_read_format(&shared, root.format, &format);
    }
  }
  if (error != PGEMU_SHARED_OK)
    throw std::runtime_error(std::string("[VMEM] pgemu: ") + pgemu_shared_error(error));
  if (pt_levels != format.levels || page_table_page_size.count() != 4096)
    throw std::runtime_error("[VMEM] pgemu: tables of " + std::to_string(format.levels)
                             + " levels and 4096 bytes: expected virtual_memory.num_levels and pte_page_size to say so");
  auto end = shared.guest_start + shared.guest_bytes;
  if (end > static_cast<uint64_t>(champsim::data::bytes{dram_.size()}.count()))
    std::printf("[VMEM] WARNING: physical addresses up to 0x%" PRIx64 " are beyond the physical memory, whose address mapping wraps them.\n", end);
}

VirtualMemory::VirtualMemory(champsim::data::bytes page_table_page_size, std::size_t page_table_levels, champsim::chrono::clock::duration minor_penalty,
                             MEMORY_CONTROLLER& dram_)
    : VirtualMemory(page_table_page_size, page_table_levels, minor_penalty, dram_, {})
{
}

VirtualMemory::~VirtualMemory()
{
  std::printf("[VMEM] pgemu: %zu walks, %zu faults; last entries of walks: %zu of 4K, %zu of 2M, %zu of 1G\n", walks, touched, leaves[1], leaves[2], leaves[3]);
  pgemu_shared_close(&shared);
  if (to_owner >= 0)
    close(to_owner); // the owner ends at the end of its input, and takes the name away
  if (from_owner >= 0)
    close(from_owner);
  if (owner > 0)
    waitpid(static_cast<pid_t>(owner), nullptr, 0);
}

void VirtualMemory::start_owner()
{
  const std::vector<std::string> words{setting("PGEMU_PYTHON", "python3"), "-m", "pgemu.examples.champsim.owner", name,
                                       "--design", setting("PGEMU_DESIGN", "restructure"),
                                       "--gigabytes", setting("PGEMU_GIGABYTES", "16"),
                                       "--shared-every", setting("PGEMU_SHARED_EVERY", "0"),
                                       "--cores", setting("PGEMU_CORES", "8")};
  std::vector<char*> arguments;
  for (const auto& word : words)
    arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  int ask[2], answer[2];
  if (pipe(ask) != 0 || pipe(answer) != 0)
    throw std::runtime_error("[VMEM] pgemu: no pipe");
  std::signal(SIGPIPE, SIG_IGN);
  auto child = fork();
  if (child == 0) {
    dup2(ask[0], 0);
    dup2(answer[1], 1);
    for (int file : {ask[0], ask[1], answer[0], answer[1]})
      close(file);
    execvp(arguments[0], arguments.data());
    _exit(127);
  }
  close(ask[0]);
  close(answer[1]);
  owner = child;
  to_owner = ask[1];
  from_owner = answer[0];
  int64_t ready = 0;
  if (child < 0 || !receive(from_owner, &ready, sizeof ready))
    throw std::runtime_error("[VMEM] pgemu: its owner did not start; PGEMU_PYTHON says which Python has pgemu");
}

uint64_t VirtualMemory::root_of(uint32_t cpu_num) const
{
  std::vector<pgemu_shared_root> roots(4096);
  roots.resize(std::min(roots.size(), pgemu_shared_roots(&shared, roots.data(), roots.size())));
  for (const auto& root : roots) {
    if (root.kind == PGEMU_ROOT_VM && root.number == cpu_num)
      return root.address;
  }
  throw std::runtime_error("[VMEM] pgemu: no tables for core " + std::to_string(cpu_num) + ", see PGEMU_CORES");
}

pgemu_shared_walked VirtualMemory::walk(uint32_t cpu_num, champsim::page_number vaddr, bool& fault)
{
  // Guest physical addresses have as many bits as the tables take: of a canonical address those below the sign.
  const uint64_t address = champsim::address{vaddr}.to<uint64_t>() & ((UINT64_C(1) << (format.input_bits - 1)) - 1);
  const uint64_t root = root_of(cpu_num);
  pgemu_shared_walked walked;
  fault = false;
  if (pgemu_shared_walk(&shared, &format, root, address, &walked) == PGEMU_WALK_NOT_PRESENT) {
    const uint64_t asked[2] = {cpu_num, address};
    int64_t status = 0;
    if (!send(to_owner, asked, sizeof asked) || !receive(from_owner, &status, sizeof status))
      throw std::runtime_error("[VMEM] pgemu: its owner has ended");
    if (status != 0)
      throw std::runtime_error("[VMEM] pgemu: the page of an address cannot be mapped (" + std::to_string(status)
                               + "); PGEMU_GIGABYTES says how many GiB of addresses there may be");
    fault = true;
    touched++;
    pgemu_shared_walk(&shared, &format, root, address, &walked);
  }
  if (walked.status != PGEMU_WALK_OK)
    throw std::runtime_error("[VMEM] pgemu: a walk ended with status " + std::to_string(walked.status));
  return walked;
}

champsim::dynamic_extent VirtualMemory::extent(std::size_t level) const
{
  const champsim::data::bits lower{LOG2_PAGE_SIZE + champsim::lg2(pte_page_size.count()) * (level - 1)};
  return champsim::dynamic_extent{lower, static_cast<std::size_t>(champsim::lg2(pte_page_size.count()))};
}

champsim::data::bits VirtualMemory::shamt(std::size_t level) const { return extent(level).lower; }

uint64_t VirtualMemory::get_offset(champsim::address vaddr, std::size_t level) const { return champsim::address_slice{extent(level), vaddr}.to<uint64_t>(); }

uint64_t VirtualMemory::get_offset(champsim::page_number vaddr, std::size_t level) const { return get_offset(champsim::address{vaddr}, level); }

std::size_t VirtualMemory::available_ppages() const
{
  const auto pages = static_cast<std::size_t>(shared.guest_bytes / 4096);
  return pages - std::min(pages, touched);
}

std::pair<champsim::page_number, champsim::chrono::clock::duration> VirtualMemory::va_to_pa(uint32_t cpu_num, champsim::page_number vaddr)
{
  bool fault = false;
  const auto walked = walk(cpu_num, vaddr, fault);
  walks++;
  leaves[std::min(walked.level, 3U)]++;
  return {champsim::page_number{champsim::address{walked.physical}}, fault ? minor_fault_penalty : champsim::chrono::clock::duration::zero()};
}

std::pair<champsim::address, champsim::chrono::clock::duration> VirtualMemory::get_pte_pa(uint32_t cpu_num, champsim::page_number vaddr, std::size_t level)
{
  if (level >= pt_levels) // the root is there without a fault
    return {champsim::address{root_of(cpu_num) + get_offset(vaddr, pt_levels) * 8}, champsim::chrono::clock::duration::zero()};
  bool fault = false;
  const auto walked = walk(cpu_num, vaddr, fault);
  const auto place = std::min(pt_levels - level, static_cast<std::size_t>(walked.count - 1));
  return {champsim::address{walked.where[place]}, fault ? minor_fault_penalty : champsim::chrono::clock::duration::zero()};
}
